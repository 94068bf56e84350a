"""A service of buckets, each of the two that there are."""

import bucket_servers
import pytest


@pytest.fixture(scope="module", params=["google", "amazon"])
def service(request):
    made, close = getattr(bucket_servers, request.param)()
    undo = bucket_servers.use(made)
    yield made
    undo()
    close()
