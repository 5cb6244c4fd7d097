"""The contracts of a method, to test one in a package of your own."""
