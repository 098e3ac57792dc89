"""Experiments of part II: SAM from first principles, and SAM at its own edge."""
