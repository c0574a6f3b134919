"""Work in processes of their own, bounded in time and memory, that leave nothing behind."""
