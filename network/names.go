package network

// Names are what the objects of one pool are called on the host.
type Names struct {
	Table           string // nftables table of family inet
	LinkPrefix      string // followed by the slot's index
	NamespacePrefix string // followed by the slot's index and "r" or "i"
}

// NamesOf returns the names that a pool with the tag uses, for those who look
// for what a pool left behind.
func NamesOf(tag string) Names {
	return Names{Table: tableName(tag), LinkPrefix: linkPrefix(tag), NamespacePrefix: nsPrefix(tag)}
}
