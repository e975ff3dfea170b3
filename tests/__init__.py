"""Old versions of detectron2 can be imported only once the package has prepared them."""

import kn_detectron  # noqa: F401
