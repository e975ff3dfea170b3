"""What has to be settled before torch and detectron2 are imported."""

import os

# Tiny models gain nothing from a second thread; who wants more, sets the variable. On cores that
# are shared, threads that spin while they wait for each other take ten times as long. Both hold in
# the processes that tests start, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What commands print and draw is compared, whatever whoever runs the tests likes it to look like.
os.environ.pop("FORCE_COLOR", None)
os.environ.pop("MATPLOTLIBRC", None)
os.environ["PYTHON_COLORS"] = "0"

# Old versions of detectron2 can be imported only once the package has prepared them.
import kn_detectron  # noqa: E402, F401
