"""What auxfast knows of autograd: a leaf, which imports torch only and is the one room that uses its private names."""
