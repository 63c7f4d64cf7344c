"""Makes the packages that TESTS_BLOCKED names unimportable: one environment may have both
frameworks, no process."""

import os
import sys

for name in os.environ.get("TESTS_BLOCKED", "").split():
    sys.modules[name] = None  # type: ignore[assignment]
