"""Networks of the methods that bring weights of their own. Import them from their files."""
