package main

import "strings"

// allowed are the tests that may be skipped: package and test, and why that
// hides nothing.
var allowed = map[string]string{
	"blob/file.TestMemoryKeepsTheContractToo/local_path": "the store in memory has no files; the one in files has that part",
	"network.TestOnThreadNeverMainThread":                "the scheduler may give the main thread nothing to do, by chance",
	"test/edge.TestACME":                                 "runs every night; package certificate has the same authority in every run",
	"template.TestRealBase":                              "builds from Debian's archive; the whole-program tests do so once, with the real program",
}

// maySkip returns why a test may be skipped.
func maySkip(pkg, test string) (string, bool) {
	if why, ok := allowed[pkg+"."+test]; ok {
		return why, true
	}
	if strings.HasPrefix(test, "Fuzz") && strings.Contains(test, "/") {
		return "an input that the fuzz target does not take", true
	}
	return "", false
}
