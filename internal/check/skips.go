package main

// allowed are the tests that may be skipped: package and test, and why that
// hides nothing.
var allowed = map[string]string{
	"template.TestRealBase": "builds from Debian's archive; the whole-program tests do so once, with the real program",
}
