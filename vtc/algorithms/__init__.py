"""What several methods share: comparing frames, matching, token caches, projectors, knapsacks."""
