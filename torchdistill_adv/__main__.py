"""``python -m torchdistill_adv`` is ``torchdistill-adv``."""

import sys

from torchdistill_adv.cli import main

sys.exit(main())
