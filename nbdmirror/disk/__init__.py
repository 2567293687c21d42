"""What a guest sees, and what guests and copiers share: the disk, its bitmaps, the ledger."""
