"""Write a checkpoint as OpenVINO's files, in fp32.

    python openvino_export.py MODEL FOLDER

Runs in its peer's environment, which knows nothing of the rest of this repository.
"""

import sys

from optimum.exporters.openvino import main_export

if __name__ == "__main__":
    main_export(*sys.argv[1:], task="text-generation-with-past")
