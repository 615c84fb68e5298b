"""What no forward pass touches: pictures, conversion, inspection, the hub."""
