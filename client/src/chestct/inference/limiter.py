"""How many concurrent requests a server is sent."""

__all__ = ["ConcurrencyLimiter"]


class ConcurrencyLimiter:
    """Limit of concurrent requests to a server: raised as long as throughput rises.

    Requests are counted in windows in which the limit was reached all the time. A window whose
    rate is the best so far by `GAIN` raises the limit by one; any other one lowers it to the one
    that the best rate was measured with, and after `REST` such windows one more request is tried
    again. A failure halves the limit.
    """

    FIRST, MOST = 2, 32
    GAIN = 1.05
    WINDOW = 4  # times the limit: requests in a window
    LEAST_REQUESTS = 12
    REST = 10

    def __init__(self) -> None:
        """Starts with a limit of `FIRST`."""
        self.limit = self.FIRST
        self._best_rate = 0.0
        self._best_limit = self.FIRST
        self._num_rests = 0
        self._since_s, self._count = 0.0, -1  # the first answer opens a window

    def succeeded(self, now_s: float, *, is_full: bool) -> None:
        """Count one answer.

        Args:
            now_s: Seconds of any steady clock.
            is_full: Whether as many requests as the limit allows are under way.
        """
        if not is_full or self._count < 0:
            self._start_window(now_s)
            return
        self._count += 1
        if self._count < max(self.WINDOW * self.limit, self.LEAST_REQUESTS):
            return
        rate = self._count / max(now_s - self._since_s, 1e-9)
        if rate > self.GAIN * self._best_rate:
            self._best_rate, self._best_limit, self._num_rests = rate, self.limit, 0
            self.limit = min(self.limit + 1, self.MOST)
        else:
            self.limit = self._best_limit
            self._num_rests += 1
            if self._num_rests == self.REST:
                # The load of others may have changed since: measure both anew.
                self._best_rate, self._num_rests = rate / self.GAIN, 0
                self.limit = min(self.limit + 1, self.MOST)
        self._start_window(now_s)

    def failed(self) -> None:
        """Count a request at which the server was unavailable or late."""
        self.limit = max(self.limit // 2, 1)
        self._best_rate, self._best_limit, self._num_rests = 0.0, self.limit, 0
        self._count = -1

    def _start_window(self, now_s: float) -> None:
        self._since_s, self._count = now_s, 0
