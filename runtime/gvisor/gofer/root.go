package gofer

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// CloneTree returns a descriptor of a directory and what is mounted below it, as
// a mount that is nowhere yet. Whoever gets it can put it into a mount namespace
// from which the directory cannot be seen.
func CloneTree(path string) (int, error) {
	tree, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return -1, fmt.Errorf("opening the guest's root %s: %w", path, err)
	}
	return tree, nil
}

// A file server that is started before its guest is known connects to a socket
// of the supervisor and waits there. Together with its guest's root directory
// comes one byte; when the connection ends without it there will be no guest.

// connect connects to the supervisor's socket. It uses no package net, whose
// poller would go on after the filter of system calls is there.
func connect(path string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("asking for a root: %w", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return -1, errors.Join(fmt.Errorf("asking for a root: %w", err), unix.Close(fd))
	}
	return fd, nil
}

// receiveTree waits for a root directory and closes the connection. It returns
// -1 if there will be no guest.
func receiveTree(conn int) (tree int, err error) {
	defer unix.Close(conn)
	var b [1]byte
	rights := make([]byte, unix.CmsgSpace(4))
	n, size := 0, 0
	for {
		n, size, _, _, err = unix.Recvmsg(conn, b[:], rights, unix.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return -1, fmt.Errorf("receiving the root: %w", err)
	}
	if n == 0 {
		return -1, nil
	}
	messages, err := unix.ParseSocketControlMessage(rights[:size])
	if err != nil || len(messages) != 1 {
		return -1, fmt.Errorf("receiving the root: %d messages: %w", len(messages), errors.Join(err, unix.EBADMSG))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("receiving the root: %d descriptors: %w", len(fds), errors.Join(err, unix.EBADMSG))
	}
	return fds[0], nil
}
