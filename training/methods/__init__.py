"""What is trained: a patch, or one of the methods it is compared with."""
