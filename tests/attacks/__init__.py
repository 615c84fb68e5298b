"""Files that hostile strangers could send, made by code, and the tests that open them."""
