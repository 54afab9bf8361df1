"""What this machine has: memory, disks, compilers, DeepSpeed's compiled ops."""
