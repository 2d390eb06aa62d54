package doctor

import (
	"context"
	"fmt"
	"io/fs"
	"slices"
	"strings"
)

// hardeningChecks look for what lets one sandbox learn from another through
// the machine. None of it keeps Cay from working.
var hardeningChecks = []check{
	{id: "host.cpu", title: "processor leaks", run: checkVulnerabilities},
	{id: "host.smt", title: "hyper-threading", run: checkSMT},
	{id: "host.ksm", title: "page merging", run: checkKSM},
	{id: "host.swap", title: "swap", run: checkSwap},
}

const vulnerabilities = "sys/devices/system/cpu/vulnerabilities"

func checkVulnerabilities(_ context.Context, d *Doctor) Finding {
	entries, err := fs.ReadDir(d.Root, vulnerabilities)
	if err != nil {
		return skip("the kernel does not tell")
	}
	var open []string
	for _, e := range entries {
		if s, err := d.read(vulnerabilities + "/" + e.Name()); err == nil && strings.HasPrefix(s, "Vulnerable") {
			open = append(open, e.Name())
		}
	}
	if open == nil {
		return ok("the kernel counters all %d known leaks", len(entries))
	}
	slices.Sort(open)
	return warn("not countered: "+strings.Join(open, ", ")+"; matters when sandboxes of people who do not trust each other share this machine",
		"install the processor's microcode (intel-microcode or amd64-microcode), do not boot with mitigations=off; in a virtual machine this is up to its host")
}

func checkSMT(_ context.Context, d *Doctor) Finding {
	active, err := d.read("sys/devices/system/cpu/smt/active")
	if err != nil {
		return skip("the kernel does not tell")
	}
	if active != "1" {
		return ok("off")
	}
	entries, _ := fs.ReadDir(d.Root, vulnerabilities) // none: nothing to say about them
	var leaks []string
	for _, e := range entries {
		if s, err := d.read(vulnerabilities + "/" + e.Name()); err == nil && strings.Contains(s, "SMT vulnerable") {
			leaks = append(leaks, e.Name())
		}
	}
	if leaks == nil {
		return ok("on, and no known leak between the threads of a core")
	}
	return warn(fmt.Sprintf("on, and this processor leaks between the threads of a core (%s)", strings.Join(leaks, ", ")),
		"for sandboxes of people who do not trust each other, boot with the kernel parameter nosmt")
}

func checkKSM(_ context.Context, d *Doctor) Finding {
	run, known := d.number("sys/kernel/mm/ksm/run")
	if known && run == 1 {
		return warn("on: equal pages of different programs are merged, which tells one program what another holds",
			"`echo 2 > /sys/kernel/mm/ksm/run`")
	}
	return ok("off")
}

func checkSwap(_ context.Context, d *Doctor) Finding {
	text, err := d.read("proc/swaps")
	if err != nil {
		return ok("none")
	}
	var on []string
	for i, line := range strings.Split(text, "\n") {
		if f := strings.Fields(line); i > 0 && len(f) > 0 && !strings.Contains(f[0], "zram") {
			on = append(on, f[0])
		}
	}
	if on == nil {
		return ok("none")
	}
	return warn("on ("+strings.Join(on, ", ")+"): what sandboxes hold in memory, secrets too, may be written to disk",
		"`swapoff -a` and remove it from /etc/fstab, or encrypt it")
}
