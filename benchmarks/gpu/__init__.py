"""What only a GPU can tell, in order of worth: `make gpu`. Every program runs on the device that there is."""
