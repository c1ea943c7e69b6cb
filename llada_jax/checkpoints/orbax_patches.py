"""What Orbax 0.12 does not do by itself: write to s3://, and keep repeated tracebacks off the
screen.

Both reach into private parts of Orbax and may break with its next version; tests of each
(tests/storage/test_remote.py, tests/whole_runs) then fail. setup.py bounds the version.
"""

import functools
import logging
import sys
import traceback
import warnings

from llada_jax.storage.arrays import s3_spec


@functools.cache
def teach_orbax_s3() -> None:
    """Lets Orbax hand s3:// to tensorstore, which can write it; Orbax 0.12 itself passes on gs://
    and local paths only.

    The two functions that are replaced are where Orbax chooses the driver (google/orbax#2739
    proposes the same to its authors). The alternative, a mounted bucket, would ask for a FUSE
    driver on every host.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    # Each replacement calls what it replaces. A second call of this function would wrap the first
    # replacement, which functools.cache prevents.
    is_gcs, gcs_spec = tensorstore_utils._use_gcs_driver, gcs_utils.get_kvstore_for_gcs
    # One slash: Orbax has normalised the path to s3:/bucket/... by then.
    is_s3 = lambda directory: directory.startswith("s3:/")  # noqa: E731
    tensorstore_utils._use_gcs_driver = lambda directory: is_gcs(directory) or is_s3(directory)
    gcs_utils.get_kvstore_for_gcs = lambda directory: (s3_spec if is_s3(directory) else gcs_spec)(
        directory
    )


def drop_echoes() -> None:
    """Keeps off the screen what Orbax and its event loop say about a failed read or save: late, in
    many tracebacks, and from threads of their own. The one sentence of the UserError is enough.
    """
    logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").addFilter(
        lambda record: "never retrieved" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", message="coroutine 'PyTreeHandler", category=RuntimeWarning)
    report = sys.unraisablehook

    # Reads that end, or are dropped, after the first of them has failed.
    def hook(unraisable):
        frames = traceback.extract_tb(unraisable.exc_traceback)
        is_echo = any("/orbax/" in frame.filename for frame in frames)
        if not is_echo and "Event loop is closed" not in str(unraisable.exc_value):
            report(unraisable)

    sys.unraisablehook = hook
