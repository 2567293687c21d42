"""`python -m nbdmirror`."""

import sys

from nbdmirror.cli import main

sys.exit(main())
