"""Known vulnerabilities in the pinned packages: python .ci/audit.py requirements/*.txt

Ends with exit code 1 where one is found. A service that cannot be asked, or does not know a package, is no finding and
no acquittal either: it is said in a line.
"""

from __future__ import annotations

import json
import subprocess
import sys

PIP_AUDIT = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--format=json", "--progress-spinner=off"]
LIMIT_S = 60


def audit(file: str) -> int:
    """How many packages of `file` have a known vulnerability."""
    try:
        done = subprocess.run([*PIP_AUDIT, "-r", file], capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        print(f"{file}: could not ask the service for vulnerabilities within {LIMIT_S} s")
        return 0
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except json.JSONDecodeError:
        why = (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
        print(f"{file}: could not ask the service for vulnerabilities: {why}")
        return 0
    found = [package for package in packages if package.get("vulns")]
    for package in found:
        for vulnerability in package["vulns"]:
            mended = ", ".join(vulnerability["fix_versions"]) or "no version yet"
            print(f"{file}: {package['name']}=={package['version']}: {vulnerability['id']}; mended in {mended}")
    # a service that answers "not found" to everything would look like a clean bill
    unknown = sum("skip_reason" in package for package in packages)
    if unknown == len(packages):
        print(f"{file}: could not ask the service for vulnerabilities: it knows none of the {unknown} packages")
    else:
        print(f"{file}: {len(packages) - unknown} of {len(packages)} packages audited, {len(found)} vulnerable")
    return len(found)


if __name__ == "__main__":
    sys.exit(sum(audit(file) for file in sys.argv[1:]) > 0)
