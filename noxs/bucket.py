"""A leaky bucket: how much somebody may use of something, on the average and at once."""


class Bucket:
    """Fills with ``rate`` per second up to ``burst``; the clock is the caller's, in seconds.

    What was used is taken even if there was not so much: then it is empty for the longer.
    """

    __slots__ = ("burst", "level", "rate", "since")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate = rate
        self.burst = burst
        self.level = burst
        self.since = now

    def take(self, amount: float, now: float) -> None:
        """Use an amount."""
        self.level = min(self.burst, self.level + (now - self.since) * self.rate) - amount
        self.since = now

    def wait(self, now: float) -> float:
        """Seconds until it is not empty; 0 if it is not."""
        level = self.level + (now - self.since) * self.rate
        return max(0.0, -level / self.rate)
