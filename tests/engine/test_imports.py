import subprocess
import sys

# What is missing on a bare machine with an accelerator.
ABSENT = (
    "litestar",
    "obstore",
    "sqlalchemy",
    "uvicorn",
    "asyncpg",
    "multipart",
    "re2",
    "llguidance",
)
PROGRAM = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
import engine.core
"""


def test_the_core_imports_on_a_machine_without_the_servers_packages() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(absent=set(ABSENT))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
