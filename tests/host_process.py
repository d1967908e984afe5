"""One host of a run, as a process of its own: `python host_process.py VERIFIED_LOG ARGUMENTS`.

Does what `python -m jexit.main ARGUMENTS` does, and writes every problem that it verifies to a log.
"""

import sys

from jexit.main import main
from jexit.tasks.sums import Sums

if __name__ == "__main__":
    log, *arguments = sys.argv[1:]
    verify = Sums.verify

    def logged(self, problem, completion):
        with open(log, "a") as file:
            print(problem.prompt, file=file)
        return verify(self, problem, completion)

    Sums.verify = logged
    code = main([sys.argv[0], *arguments])
    sys.exit(code)
