"""One forward call: the settings, what is added at each site, and the hooks that add it."""
