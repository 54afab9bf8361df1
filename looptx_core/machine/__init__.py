"""What this machine has: memory, disks, compilers."""
