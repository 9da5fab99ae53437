#include "textflag.h"

// Both loops write 16 bytes at a time, for which the address must be a
// multiple of 16: one 8-byte store at the front sees to that where needed, and
// more of them do the rest that is no 64 bytes.

// func store(dst, src unsafe.Pointer, n uintptr)
TEXT ·store(SB), NOSPLIT, $0-24
	MOVQ dst+0(FP), DI
	MOVQ src+8(FP), SI
	MOVQ n+16(FP), CX
	CMPQ CX, $8
	JB   done
	TESTQ $8, DI
	JZ   aligned
	MOVQ (SI), AX
	MOVNTIQ AX, (DI)
	ADDQ $8, SI
	ADDQ $8, DI
	SUBQ $8, CX

aligned:
	SUBQ $64, CX
	JB   rest

lines:
	MOVOU 0(SI), X0
	MOVOU 16(SI), X1
	MOVOU 32(SI), X2
	MOVOU 48(SI), X3
	MOVNTO X0, 0(DI)
	MOVNTO X1, 16(DI)
	MOVNTO X2, 32(DI)
	MOVNTO X3, 48(DI)
	ADDQ $64, SI
	ADDQ $64, DI
	SUBQ $64, CX
	JAE  lines

rest:
	ADDQ $64, CX
	JZ   done

words:
	MOVQ (SI), AX
	MOVNTIQ AX, (DI)
	ADDQ $8, SI
	ADDQ $8, DI
	SUBQ $8, CX
	JNZ  words

done:
	RET

// func storeZero(dst unsafe.Pointer, n uintptr)
TEXT ·storeZero(SB), NOSPLIT, $0-16
	MOVQ dst+0(FP), DI
	MOVQ n+8(FP), CX
	XORQ AX, AX
	PXOR X0, X0
	CMPQ CX, $8
	JB   done
	TESTQ $8, DI
	JZ   aligned
	MOVNTIQ AX, (DI)
	ADDQ $8, DI
	SUBQ $8, CX

aligned:
	SUBQ $64, CX
	JB   rest

lines:
	MOVNTO X0, 0(DI)
	MOVNTO X0, 16(DI)
	MOVNTO X0, 32(DI)
	MOVNTO X0, 48(DI)
	ADDQ $64, DI
	SUBQ $64, CX
	JAE  lines

rest:
	ADDQ $64, CX
	JZ   done

words:
	MOVNTIQ AX, (DI)
	ADDQ $8, DI
	SUBQ $8, CX
	JNZ  words

done:
	RET

// func fence()
TEXT ·fence(SB), NOSPLIT, $0-0
	SFENCE
	RET
