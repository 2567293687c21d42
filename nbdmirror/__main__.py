"""`python -m nbdmirror`."""

import sys

from nbdmirror.cli.main import main

sys.exit(main())
