"""photon.silo that has time for its last words, however slow the machine is."""

import sys

from photon.silo import service
from photon.silo.__main__ import main

service._LAST_WORDS_S = 20.0
sys.exit(main(sys.argv[2:]))  # before them: the module's name, as for `python -m`
