"""What training and evaluation read: images, subsets, and the bundled testbed."""
