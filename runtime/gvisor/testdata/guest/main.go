// Command guest is PID 1 of the guests of the tests: it does what its arguments
// say.
package main

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	verb, args := os.Args[1], os.Args[2:]
	switch verb {
	case "exit": // with a code
		code, _ := strconv.Atoi(args[0])
		os.Exit(code)
	case "run": // for ever
		forever()
	case "later": // exit after so many milliseconds, with a code
		ms, _ := strconv.Atoi(args[0])
		code, _ := strconv.Atoi(args[1])
		time.Sleep(time.Duration(ms) * time.Millisecond)
		os.Exit(code)
	case "print": // a text, then run
		fmt.Println(strings.Join(args, " "))
		forever()
	case "stamp": // the clock at the first instruction of main
		fmt.Println("stamp", time.Now().UnixNano())
		forever()
	case "flood": // the console with so many bytes, then say so
		n, _ := strconv.Atoi(args[0])
		line := bytes.Repeat([]byte("x"), 1023)
		line = append(line, '\n')
		for i := 0; i < n; i += len(line) {
			os.Stdout.Write(line)
		}
		fmt.Println("flood done")
		for {
			time.Sleep(100 * time.Millisecond)
			fmt.Println("after flood")
		}
	case "tick": // a counter to the console
		for i := 0; ; i++ {
			fmt.Println("tick", i)
			time.Sleep(20 * time.Millisecond)
		}
	case "memory": // use so many bytes, in steps
		n, _ := strconv.Atoi(args[0])
		var keep [][]byte
		for used := 0; used < n; used += 8 << 20 {
			b := make([]byte, 8<<20)
			for i := range b {
				b[i] = byte(i)
			}
			keep = append(keep, b)
		}
		fmt.Println("memory held", len(keep))
		forever()
	case "check": // fill so many bytes and look at them again and again
		n, _ := strconv.Atoi(args[0])
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i % 251)
		}
		for {
			for i, c := range b {
				if c != byte(i%251) {
					fmt.Println("byte", i, "is", c)
				}
			}
			fmt.Println("checked")
			time.Sleep(20 * time.Millisecond)
		}
	case "fork": // so many children that live
		n, _ := strconv.Atoi(args[0])
		for i := range n {
			if err := exec.Command("/init", "run").Start(); err != nil {
				fmt.Println("fork failed at", i, err)
				break
			}
			if (i+1)%50 == 0 {
				fmt.Println("forked", i+1)
			}
		}
		fmt.Println("fork done")
		forever()
	case "spin": // burn all CPUs
		for range 8 {
			go func() {
				for {
				}
			}()
		}
		forever()
	case "look": // say what the guest sees
		look()
		forever()
	case "term": // exit 7 on SIGTERM
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM)
		<-c
		os.Exit(7)
	case "segv":
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		forever()
	}
}

func forever() {
	for {
		time.Sleep(time.Hour)
	}
}

func look() {
	host, _ := os.Hostname()
	fmt.Println("hostname", host)
	fmt.Println("uid", os.Getuid())
	env := os.Environ()
	slices.Sort(env) // gVisor hands it on in any order
	fmt.Println("env", strings.Join(env, ","))
	mounts, _ := os.ReadFile("/proc/mounts")
	for line := range strings.Lines(string(mounts)) {
		fmt.Print("mount ", line)
	}
	info, _ := os.ReadFile("/proc/meminfo")
	fmt.Println("meminfo", strings.SplitN(string(info), "\n", 2)[0])
	for _, d := range []string{"/tmp", "/dev/shm", "/"} {
		var st syscall.Statfs_t
		err := syscall.Statfs(d, &st)
		fmt.Printf("statfs %s type=%x size=%d err=%v\n", d, st.Type, int64(st.Blocks)*st.Bsize, err)
	}
	ifs, _ := net.Interfaces()
	for _, i := range ifs {
		a, _ := i.Addrs()
		fmt.Println("link", i.Name, a)
	}
	fmt.Println("look done")
}
