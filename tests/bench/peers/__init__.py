"""What runs in processes of its own beside ours: engines of either environment, and the torchrun job."""
