"""Makes OpenMP's threads sleep while they wait for each other. To be imported before torch, which starts OpenMP.

Threads that spin are a little faster when nothing else runs, and ten times slower when something does.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
