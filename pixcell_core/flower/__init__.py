"""What both ends of the Flower connection share: child processes that never outlive us, and the warm executor."""
