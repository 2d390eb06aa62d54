package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// port is one that envd serves; name is its flag's.
type port struct {
	name string
	port int
}

// envdPorts are those of package envd, whose size this program does not want.
var envdPorts = []port{{"public", 49983}, {"control", 49982}}

// listener is an open port.
type listener struct {
	name string
	fd   int
}

// openPorts listens on ports of every address, or on none of them.
func openPorts(ports []port) (out []listener, err error) {
	defer func() {
		if err != nil {
			for _, l := range out {
				_ = unix.Close(l.fd)
			}
			out = nil
		}
	}()
	for _, p := range ports {
		// Not of package net, which would ask for what else this machine can.
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return out, fmt.Errorf("making a socket: %w", err)
		}
		out = append(out, listener{p.name, fd})
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return out, fmt.Errorf("preparing the %s port: %w", p.name, err)
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: p.port}); err != nil {
			return out, fmt.Errorf("taking the %s port %d: %w", p.name, p.port, err)
		}
		if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
			return out, fmt.Errorf("listening on the %s port %d: %w", p.name, p.port, err)
		}
	}
	return out, nil
}
