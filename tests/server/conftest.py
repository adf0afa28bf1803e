"""What several server tests share: the nodes as the server tells them, and one run of the quickstart workflow."""

from dataclasses import dataclass

import pytest

from tests.harness.quickstart import ROLES, pictures, quickstart_prompt, report_summary


@dataclass
class QuickstartRun:
    """A finished run: the files of each role as bytes, and the report's summary."""

    pictures: dict[str, list[bytes]]
    summary: dict


@pytest.fixture(scope="session")
def object_info(comfy_server) -> dict:
    return comfy_server.object_info()


@pytest.fixture(scope="session")
def quickstart(object_info) -> dict:
    """workflows/quickstart.json as a prompt."""
    return quickstart_prompt(object_info)


@pytest.fixture(scope="session")
def quickstart_run(comfy_server, quickstart) -> QuickstartRun:
    entry = comfy_server.run(quickstart)
    found = {role: pictures(comfy_server, quickstart, entry, role) for role in ROLES}
    return QuickstartRun(found, report_summary(quickstart, entry))
