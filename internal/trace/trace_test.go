package trace

import (
	"bytes"
	"compress/gzip"
	"errors"
	"slices"
	"strings"
	"testing"
)

// forms are the same accesses in each form, with what is none between them.
var forms = map[string]string{
	"plain": "R 4096 8192\n\nW 1024 512\n",
	"blkparse": `Input file sda.blktrace.0 added
  8,0    3        1     0.000000000   697  A   R 8 + 16 <- (8,1) 0
  8,0    3        2     0.000000100   697  Q   R 8 + 16 [fio]
  8,0    3        3     0.000000200   697  G   R 8 + 16 [fio]
  8,0    3        0     0.000000300     0  m   N cfq697 alloced
  8,0    3        4     0.000000300   697  Q FWS [fio]
  8,0    1        1     0.000000400   697  Q  FN [fio]
  8,0    1        2     0.000000500   697  Q   D 64 + 8 [fio]
  8,0    1        2     0.000000550   697  Q  ZR 64 + 8 [fio]
  8,0    1        3     0.000000600   697  Q FWFS 2 + 1 [a name]
  8,0    1        4     0.000000700   697  C   R 8 + 16 [0]
CPU0 (sda):
 Reads Queued:           1,        8KiB	 Writes Queued:           1,        0KiB

Total (sda):
 Reads Queued:           1,        8KiB	 Writes Queued:           1,        0KiB
Throughput (R/W): 8KiB/s / 0KiB/s
`,
	"msr":    "128166372003061629,hm,1,Read,4096,8192,151\r\n128166372016382155,hm,1,Write,1024,512,2326\r\n",
	"header": "Timestamp,Hostname,DiskNumber,Type,Offset,Size,ResponseTime\n1,hm,1,Read,4096,8192,151\n2,hm,1,Write,1024,512,2\n",
	"iolog2": "fio version 2 iolog\n/dev/sda add\n/dev/sda open\n/dev/sda read 4096 8192\n/dev/sda wait 100 0\n/dev/sda sync 0 0\n/dev/sda trim 0 512\n/dev/sda write 1024 512\n/dev/sda close\n",
	"iolog3": "fio version 3 iolog\n0 /dev/sda add\n0 /dev/sda open\n7 /dev/sda read 4096 8192\n8 /dev/sda datasync 0 0\n9 /dev/sda write 1024 512\n9 /dev/sda close\n",
}

var same = []Access{{false, 4096, 8192}, {true, 1024, 512}}

// TestForms: each form is known by its content, compressed or not.
func TestForms(t *testing.T) {
	for form, text := range forms {
		var packed bytes.Buffer
		z := gzip.NewWriter(&packed)
		z.Write([]byte(text))
		z.Close()
		for _, content := range []string{text, packed.String()} {
			got, err := all(content)
			if err != nil || !slices.Equal(got, same) {
				t.Errorf("%s: %v, %v", form, got, err)
			}
		}
	}
}

func all(text string) (list []Access, err error) {
	for a, err := range Read(strings.NewReader(text), "some.trace") {
		if err != nil {
			return list, err
		}
		list = append(list, a)
	}
	return list, nil
}

// TestErrors: what is wrong is one line that says where.
func TestErrors(t *testing.T) {
	const blk = "8,0 3 2 0.1 697 Q R 8 + 16 [fio]\n"
	for _, c := range []struct {
		text, says string
		is         error
	}{
		{"", "some.trace: ", ErrNoTrace},
		{"\n\n", "some.trace: ", ErrNoTrace},
		{"hello\n", "some.trace: line 1: ", ErrForm},
		{"fio version 4 iolog\n", "some.trace: line 1: ", ErrForm},
		{"R 1 2\nX 1 2\n", "some.trace: line 2: ", ErrLine},
		{"R 1 2\n\nR 1\n", "some.trace: line 3: ", ErrLine},
		{"R 1 2 3\n", "some.trace: line 1: ", ErrLine},
		{"R -1 2\n", `"-1" is not an offset`, ErrLine},
		{"R 1 0\n", `"0" is not a length`, ErrLine},
		{"R 1 x\n", `"x" is not a length`, ErrLine},
		{"R 9223372036854775807 1\n", "is not a length", ErrLine},
		{"W 1 9223372036854775808\n", "is not a length", ErrLine},
		{"R 1 2\nR " + strings.Repeat("1", longestLine), "some.trace: line 2: ", ErrLine},
		{blk + "8,16 3 2 0.1 697 Q R 8 + 16 [fio]\n", "line 2: the trace is of several disks, here of 8,16 and before of 8,0", ErrDisks},
		{blk + "and so on\n", "line 2: ", ErrLine},
		{blk + "8,0 3 2 0.1 697\n", "line 2: ", ErrLine},
		{blk + "8,0 3 2 0.1 697 Q\n", "line 2: ", ErrLine},
		{blk + "8,0 3 2 0.1 697 Q R 8\n", "line 2: ", ErrLine},
		{blk + "8,0 3 2 0.1 697 Q R 8 - 16 [fio]\n", "line 2: ", ErrLine},
		{blk + "8,0 3 2 0.1 697 Q R 18014398509481984 + 8 [fio]\n", "is not an offset", ErrLine},
		{"1,hm,1,Read,0,512,3\n1,hm,2,Read,0,512,3\n", "line 2: the trace is of several disks, here of hm,2 and before of hm,1", ErrDisks},
		{"1,hm,1,Read,0,512,3\n1,hm,1,Trim,0,512,3\n", `"Trim" is neither`, ErrLine},
		{"1,hm,1,Read,0,512,3\n1,hm,1,Read,0,512\n", "line 2: ", ErrLine},
		{"1,hm,1,Read,0,512,3\nTimestamp,Hostname,DiskNumber,Type,Offset,Size,ResponseTime\n", "line 2: ", ErrLine},
		{"fio version 2 iolog\na read 0 512\nb read 0 512\n", "line 3: the trace is of several disks, here of b and before of a", ErrDisks},
		{"fio version 2 iolog\na seek 0 512\n", `"seek" is no action`, ErrLine},
		{"fio version 2 iolog\na read\n", "line 2: ", ErrLine},
		{"fio version 3 iolog\n1 a\n", "line 2: ", ErrLine},
		{"fio version 3 iolog\na read 0 512\n", "line 2: ", ErrLine},
	} {
		_, err := all(c.text)
		if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%.60q: %v", c.text, err)
		}
	}
}

// TestCutOff: a file that ends in the middle of its compression is not a shorter trace.
func TestCutOff(t *testing.T) {
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	z.Write([]byte(forms["plain"]))
	z.Close()
	if _, err := all(packed.String()[:packed.Len()-9]); err == nil || !strings.Contains(err.Error(), "some.trace: read behind line ") {
		t.Error(err)
	}
}

// TestStops: nothing is read on for who has seen enough.
func TestStops(t *testing.T) {
	for range Read(strings.NewReader("R 1 2\nnothing\n"), "some.trace") {
		break
	}
}

// FuzzRead: whatever a file holds, what is read of it are accesses, and then at most one
// error that names it.
func FuzzRead(f *testing.F) {
	for _, text := range forms {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		failed, some := false, false
		for a, err := range Read(bytes.NewReader(text), "some.trace") {
			switch {
			case failed:
				t.Fatal("it goes on behind an error")
			case err != nil:
				failed = true
				if !strings.HasPrefix(err.Error(), "some.trace: ") {
					t.Fatal(err)
				}
			case a.Off < 0 || a.Len <= 0 || a.Off+a.Len < a.Off:
				t.Fatalf("%+v", a)
			default:
				some = true
			}
		}
		if !failed && !some {
			t.Fatal("there is neither an access nor an error")
		}
	})
}
