package network

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay"
)

// fail makes a typed error of a failed step. A missing privilege is named as
// such, because its repair differs.
func fail(doing string, err error) error {
	if err == nil {
		return nil
	}
	var typed *cay.Error
	if errors.As(err, &typed) {
		return err
	}
	e := &cay.Error{Code: cay.CodeNetworkUnavailable, Layer: cay.LayerNetwork,
		Message: "the sandbox network: " + doing + ": " + err.Error(),
		Fix:     "run `cay doctor` to see which part of the host's network is missing", Err: err}
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES), errors.Is(err, unix.EROFS):
		e.Code = cay.CodePrivilege
		e.Fix = "run Cay as root, or with CAP_NET_ADMIN and CAP_SYS_ADMIN and a writable /proc/sys"
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT):
		e.Fix = "the kernel lacks network namespaces, veth or nf_tables (nft_ct, nft_nat, nft_masq, nft_redir, nft_limit, nft_log, nft_fib_inet, nft_reject_inet); load or build these modules"
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		e.Fix = "the host is out of namespaces, memory or descriptors; see /proc/sys/user/max_net_namespaces and the open-file limit"
	}
	return e
}

func errNoSlot(size int) error {
	return &cay.Error{Code: cay.CodeNoSlot, Layer: cay.LayerNetwork,
		Message: fmt.Sprintf("all %d network slots of this node are in use", size),
		Fix:     "end sandboxes, or raise the number of network slots"}
}

func errNotOpen() error {
	return &cay.Error{Code: cay.CodeShuttingDown, Layer: cay.LayerNetwork,
		Message: "the network pool is not open", Fix: "try again when the server is up"}
}

// errBusy says that processes are still in the namespaces of a slot.
func errBusy(index int, pids []int) error {
	return &cay.Error{Code: cay.CodeNetworkUnavailable, Layer: cay.LayerNetwork,
		Message: fmt.Sprintf("network slot %d is cut off but not free: processes %v are still in it", index, pids),
		Fix:     "end these processes; the slot becomes free by itself then",
		Detail:  map[string]string{"pids": fmt.Sprint(pids)}}
}
