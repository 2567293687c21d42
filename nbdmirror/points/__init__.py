"""Points: a journal beside a replica, from which the disk's content at many moments is made."""
