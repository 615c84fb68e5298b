"""What repairs a cheap call: patches and their controls, on small bases (docs/RESULTS.md)."""
