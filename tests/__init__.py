"""The tests. A package, so that no other package called `tests` on the path hides it."""
