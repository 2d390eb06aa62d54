package doctor

import "strings"

// What the kernel says of IPv6: no route but the refusal that it always has, and
// one by a router.
var (
	noRoute6 = strings.Repeat("0", 32) + " 00 " + strings.Repeat("0", 32) + " 00 " + strings.Repeat("0", 32) + " ffffffff 00000001 00000000 00200200       lo\n"

	defaultRoute6 = strings.Repeat("0", 32) + " 00 " + strings.Repeat("0", 32) + " 00 fd" + strings.Repeat("0", 29) + "1 00000400 00000001 00000000 00000003     eth0\n"
)

// address6 is a line of /proc/net/if_inet6.
func address6(first, link string) string {
	return first + strings.Repeat("0", 27) + "2 02 40 00 80     " + link + "\n"
}
