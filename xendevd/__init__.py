"""The device daemon: udev event in, netlink out."""
