"""A process of its own that runs the job on many inputs: what it dies of is seen, and no test dies with it.

Reads one JSON object a line (`input`, `output`, `options`); answers with a line for each: `error`, `message`.
"""

import json
import resource
import sys

import untwin

MEMORY = 4 << 30


def answer(case):
    """Run one case; the name of its error and the message, or nothing."""
    try:
        untwin.deduplicate(case["input"], case["output"], **case["options"])
    except untwin.errors.UntwinError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except BaseException as error:
        return {"error": f"not named: {type(error).__name__}", "message": str(error)}
    return {"error": "", "message": ""}


def main():
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
