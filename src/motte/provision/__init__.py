"""From keys that the owner holds to keys inside one worker: the release, sealed so that the link carries no key."""
