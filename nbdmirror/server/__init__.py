"""All disks, nodes, bitmaps and jobs of one process."""
