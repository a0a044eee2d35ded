"""What NVFlare builds at each site of a job."""

from typing import Any

from nvflare.collab import collab

from halfpass.errors import HalfpassError
from halfpass.nvflare.settings import config_of
from halfpass.run import logs
from halfpass.run.round_client import RoundClient, refusal


class Client:
    """The client that the job says this site is, for as long as the job goes."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """`settings`: by dotted name."""
        self.settings = settings
        self._client: RoundClient | None = None

    @collab.publish
    def answer(self, message: bytes) -> bytes:
        """One round. The job gives a site one thread for these calls: one comes after the other."""
        try:
            if self._client is None:
                config = config_of(self.settings, collab.fl_ctx.get_job_id())
                logs.begin(config.log)
                self._client = RoundClient(config, collab.get_app_prop("client"))
        except HalfpassError as error:
            return refusal(message, f"site {collab.site_name}", error)
        return self._client.answer(message)
