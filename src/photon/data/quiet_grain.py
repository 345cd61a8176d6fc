"""grain, without the line on JAX that its import logs; imported late, as it takes 0.3 s."""

import logging

from absl import logging as absl_logging

__all__ = ["grain"]

_logger = absl_logging.get_absl_logger()
_level = _logger.level
_logger.setLevel(logging.ERROR)
try:
    import grain
finally:
    _logger.setLevel(_level)
