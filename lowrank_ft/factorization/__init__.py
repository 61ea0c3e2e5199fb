"""What is factorized, to which rank, and how."""
